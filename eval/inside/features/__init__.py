"""Principal components of patch tokens as maps: section 1.11 of the checklist, figures 17 and 20 of the paper."""
