"""Small things that every room uses: the console, files that appear whole, figures, prefetching, compiled programs."""
