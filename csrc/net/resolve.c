#include "net/resolve.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "net/descriptor.h"
#include "net/pin.h"

enum { MAX_THREADS = 8, MAX_ADDRESSES = 64, MAX_HOST = 255 };

struct mrn_lookup {
  mrn_lookup *next; /* waiting for a thread */
  bool wanted;      /* the asker holds it */
  bool shared;      /* the queue or a thread holds it */
  bool done;
  int ends[2];
  int code; /* of getaddrinfo */
  int system_errno;
  int port;
  size_t count;
  mrn_address *addresses;
  char host[MAX_HOST + 1];
};

/* Guards the queue, the number of threads, and what is shared in every lookup. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static mrn_lookup *first, **last = &first;
static int threads;

/* ---- life ---- */

static void destroy(mrn_lookup *lookup) {
  if (lookup->ends[0] >= 0) close(lookup->ends[0]);
  if (lookup->ends[1] >= 0) close(lookup->ends[1]);
  free(lookup->addresses);
  free(lookup);
}

static mrn_lookup *create(const char *host, int port) {
  mrn_lookup *lookup = calloc(1, sizeof *lookup);
  if (lookup == NULL) return NULL;
  lookup->wanted = true;
  lookup->ends[0] = lookup->ends[1] = -1;
  lookup->port = port;
  snprintf(lookup->host, sizeof lookup->host, "%s", host);
  return lookup;
}

void mrn_lookup_free(mrn_lookup *lookup) {
  if (lookup == NULL) return;
  pthread_mutex_lock(&lock);
  lookup->wanted = false;
  bool shared = lookup->shared;
  pthread_mutex_unlock(&lock);
  if (!shared) destroy(lookup);
}

/* ---- the thread's side ---- */

static void take_addresses(mrn_lookup *lookup, const struct addrinfo *list) {
  size_t count = 0;
  for (const struct addrinfo *a = list; a != NULL && count < MAX_ADDRESSES; a = a->ai_next) count++;
  lookup->addresses = calloc(count ? count : 1, sizeof *lookup->addresses);
  if (lookup->addresses == NULL) {
    lookup->code = EAI_MEMORY;
    return;
  }
  for (const struct addrinfo *a = list; a != NULL && lookup->count < count; a = a->ai_next) {
    mrn_address *address = &lookup->addresses[lookup->count];
    if (a->ai_addrlen > sizeof address->storage) continue;
    memcpy(&address->storage, a->ai_addr, a->ai_addrlen);
    address->length = a->ai_addrlen;
    lookup->count++;
  }
}

/* Nobody else looks at these fields before `done`. */
static void ask(mrn_lookup *lookup) {
  char service[16];
  struct addrinfo hints, *list = NULL;
  memset(&hints, 0, sizeof hints);
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  snprintf(service, sizeof service, "%d", lookup->port);
  lookup->code = getaddrinfo(lookup->host, service, &hints, &list);
  lookup->system_errno = errno;
  if (lookup->code != 0) return;
  take_addresses(lookup, list);
  freeaddrinfo(list);
}

/* With the lock held. True: nobody wants it any more. */
static bool hand_over(mrn_lookup *lookup) {
  lookup->shared = false;
  if (!lookup->wanted) return true;
  lookup->done = true;
  ssize_t written = write(lookup->ends[1], "", 1);
  (void)written; /* one byte into an empty pipe */
  return false;
}

/* With the lock held: the next lookup that somebody still waits for. */
static mrn_lookup *take(void) {
  while (first != NULL) {
    mrn_lookup *lookup = first;
    first = lookup->next;
    if (first == NULL) last = &first;
    if (lookup->wanted) return lookup;
    destroy(lookup);
  }
  return NULL;
}

static void *work(void *unused) {
  mrn_lookup *lookup;
  (void)unused;
  pthread_mutex_lock(&lock);
  while ((lookup = take()) != NULL) {
    pthread_mutex_unlock(&lock);
    ask(lookup);
    pthread_mutex_lock(&lock);
    if (hand_over(lookup)) destroy(lookup);
  }
  threads--;
  pthread_mutex_unlock(&lock);
  return NULL;
}

/* ---- the asker's side ---- */

/* With every signal blocked: they are for the thread that runs Lua. */
static int start_thread(void) {
  pthread_t thread;
  pthread_attr_t attributes;
  sigset_t all, old;
  mrn_pin();
  sigfillset(&all);
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int code = pthread_create(&thread, &attributes, work, NULL);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attributes);
  return code;
}

/* With the lock held. The only lookup of a queue without threads is taken back on failure. */
static int enqueue(mrn_lookup *lookup) {
  int code = 0;
  *last = lookup;
  last = &lookup->next;
  lookup->shared = true;
  if (threads >= MAX_THREADS) return 0;
  threads++;
  code = start_thread();
  if (code == 0) return 0;
  threads--;
  if (threads > 0) return 0;
  first = NULL;
  last = &first;
  lookup->shared = false;
  return code;
}

static bool answer_at_once(mrn_lookup *lookup) {
  lookup->addresses = calloc(2, sizeof *lookup->addresses);
  if (lookup->addresses == NULL) return false;
  if (mrn_address_literal(lookup->host, lookup->port, lookup->addresses)) {
    lookup->count = 1;
  } else {
    lookup->count = mrn_address_localhost(lookup->port, lookup->addresses);
  }
  lookup->done = true;
  return true;
}

static bool known_at_once(const char *host) {
  return strcmp(host, "localhost") == 0 || mrn_address_literal(host, 0, NULL);
}

static int begin(mrn_lookup *lookup) {
  if (known_at_once(lookup->host)) return answer_at_once(lookup) ? 0 : ENOMEM;
  if (!mrn_pipe(lookup->ends)) return errno;
  pthread_mutex_lock(&lock);
  int code = enqueue(lookup);
  pthread_mutex_unlock(&lock);
  return code;
}

mrn_lookup *mrn_lookup_start(const char *host, int port, mrn_error *err) {
  if (host[0] == '\0' || strlen(host) > MAX_HOST) {
    mrn_fail(err, MRN_DNS, "a host name has 1 to %d bytes", MAX_HOST);
    err->temporary = false;
    return NULL;
  }
  mrn_lookup *lookup = create(host, port);
  int code = lookup == NULL ? ENOMEM : begin(lookup);
  if (code == 0) return lookup;
  if (lookup != NULL) destroy(lookup);
  mrn_fail_errno(err, MRN_DNS, code);
  return NULL;
}

int mrn_lookup_fd(const mrn_lookup *lookup) { return lookup->ends[0]; }

/* A name that is unknown now may be known soon (a service whose pods are all starting has no
 * address), so only what can never be a name is permanent. */
static mrn_status explain(const mrn_lookup *lookup, mrn_error *err) {
  if (lookup->code == EAI_SYSTEM) return mrn_fail_errno(err, MRN_DNS, lookup->system_errno);
  if (lookup->code == 0) return mrn_fail(err, MRN_DNS, "the name has no address");
  mrn_fail(err, MRN_DNS, "%s", gai_strerror(lookup->code));
  err->temporary = lookup->code != EAI_FAMILY && lookup->code != EAI_SERVICE;
  return MRN_DNS;
}

mrn_status mrn_lookup_result(mrn_lookup *lookup, const mrn_address **addresses, size_t *count,
                             mrn_error *err) {
  pthread_mutex_lock(&lock);
  bool done = lookup->done;
  pthread_mutex_unlock(&lock);
  if (!done) return MRN_AGAIN;
  if (lookup->code != 0 || lookup->count == 0) return explain(lookup, err);
  *addresses = lookup->addresses;
  *count = lookup->count;
  return MRN_OK;
}
