from hypothesis import settings

settings.register_profile("attending", deadline=None)
settings.load_profile("attending")
