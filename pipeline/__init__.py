"""COCO panoptic folder -> targets -> shards: the offline target cache. Free of torch."""
