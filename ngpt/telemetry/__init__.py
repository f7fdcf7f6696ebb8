"""What a run tells the outside: metrics, the places they go to, the manifest and the plot."""
