"""What a run will cost and take, from a look at some of its rows: vlm-batch plan."""
