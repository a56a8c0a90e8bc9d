"""What registers cost: section 1.13 of the checklist, appendix B of the registers paper."""
