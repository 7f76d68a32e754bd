"""Ways to reach a destination. A backend opens the server side of a flow; the relay moves the bytes."""
