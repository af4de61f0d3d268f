"""The network: attention, experts and the blocks that hold them."""
