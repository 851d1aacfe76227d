"""Weight quantisers: how the codes of a layer are chosen. One file each."""
