"""What the suites on whole images of labels or depths share: pairs of files, maps of features, small heads, scores."""
