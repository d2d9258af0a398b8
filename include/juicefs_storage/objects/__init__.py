"""What any two object stores have in common: keys, pages of a listing, comparison, engines. Pure."""
