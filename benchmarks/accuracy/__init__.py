"""What training reaches: in which time, and over several seeds."""
