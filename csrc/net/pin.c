#include "net/pin.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>

void mrn_pin(void) {
#ifdef RTLD_NODELETE
  static bool pinned;
  Dl_info info;
  if (pinned) return;
  pinned = true;
  if (dladdr((const void *)&pinned, &info) != 0 && info.dli_fname != NULL) {
    dlopen(info.dli_fname, RTLD_NOW | RTLD_NODELETE | RTLD_NOLOAD);
  }
#endif
}
