"""How the zoo's models were made: one file per recipe, and the few parts that recipes share."""
