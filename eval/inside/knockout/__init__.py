"""What the class token depends on, found by taking it away: knock-outs, swaps, masking."""
