"""What a run is: its options, its folder, its processes, and what it prints."""
