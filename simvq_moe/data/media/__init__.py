"""From files of images and sound to pixels and samples; never what is trained on them."""
