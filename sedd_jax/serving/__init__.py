"""The local page of `sedd serve`."""
