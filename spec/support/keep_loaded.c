/* Preloaded beside the sanitizer: libraries stay where they are when Lua closes, so that a leak that is found afterwards is
 * told with the names of functions and not as one of an unknown module. */
int dlclose(void *handle);

int dlclose(void *handle) {
  (void)handle;
  return 0;
}
