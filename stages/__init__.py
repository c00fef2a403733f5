"""What happens to one exposure and to one sky tile: arrays and tables in, arrays and tables out."""
