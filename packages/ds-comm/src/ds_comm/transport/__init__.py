"""Transports: how the ranks of one group exchange data. ``base`` is the interface; see ``ds_comm.communicator``."""
