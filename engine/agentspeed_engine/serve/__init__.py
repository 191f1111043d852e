"""The thin shell: process, loop thread, sockets."""
