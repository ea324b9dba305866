"""tools/ablate.py: claims and their runs, jobs, figure 1, tables and curves."""
