"""The thin shell: process, loop thread, worker thread, sockets."""
