"""`paracomm bench ddp`: data-parallel steps by engines and gradient hooks, side by side."""
