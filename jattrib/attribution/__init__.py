"""Attribution: from features, or masks and outputs, to scores."""
