"""How a diagnosis is shown: terminal tables, one self-contained HTML page, a notebook repr."""
