"""Where CLS and the registers look: section 1.10 of the checklist, figures 1, 2, 8, 9, 16, 18 and 19 of the paper."""
