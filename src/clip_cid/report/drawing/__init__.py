"""What each figure of a run is made from, what it is called on the page, and its place there."""
