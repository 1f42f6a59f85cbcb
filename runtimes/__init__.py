"""Runs a bundle: this is what goes onto the device. Imports neither torch nor mythos_export."""
