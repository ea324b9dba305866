"""What every other package may import: errors, files, the machine. No torch, DALI or OpenCV in here."""
