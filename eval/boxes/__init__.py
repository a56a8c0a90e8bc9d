"""Images with boxes around the objects in them: Pascal VOC's layout, COCO's JSON and YOLO's text files."""
