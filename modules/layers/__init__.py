"""Small layers and rules that several models share."""
