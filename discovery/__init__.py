"""Where other nodes might be: the sources `local`, `mdns` and `seeds`, behind one interface."""
