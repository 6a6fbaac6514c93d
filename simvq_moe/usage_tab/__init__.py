"""The tab of TensorBoard that shows how codes and experts are used: a plug-in that reads run
folders, and its page in static/; it measures with core/ and writes nothing.
"""
