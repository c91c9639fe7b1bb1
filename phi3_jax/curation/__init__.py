"""From raw pages to a corpus that a study trains on: rules, duplicates, contamination, provenance and a page."""
