"""What a run will cost, before anything is allocated: memory by kind and moment, operations, time, and what would make it fit."""
