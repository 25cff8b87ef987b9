"""Attribution: speed, memory, scaling and accuracy; influence against measured effects."""
