"""The Cryo-IEF vision transformer: model, layouts, preprocessing, export."""
