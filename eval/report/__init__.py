"""What people read of results: one page for a checkpoint, one table for several."""
