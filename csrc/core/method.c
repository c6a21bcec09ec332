#include "core/method.h"

#include "core/table.h"

/*
 * The arguments of each method that a broker may send. b octet or bits, w short, l long,
 * q long-long, s short string, S long string, F table.
 */
typedef struct {
  amqp_method_number_t id;
  const char *args;
} method_shape;

static const method_shape SHAPES[] = {
    {AMQP_CONNECTION_START_METHOD, "bbFSS"}, {AMQP_CONNECTION_SECURE_METHOD, "S"},
    {AMQP_CONNECTION_TUNE_METHOD, "wlw"},    {AMQP_CONNECTION_OPEN_OK_METHOD, "s"},
    {AMQP_CONNECTION_CLOSE_METHOD, "wsww"},  {AMQP_CONNECTION_CLOSE_OK_METHOD, ""},
    {AMQP_CONNECTION_BLOCKED_METHOD, "s"},   {AMQP_CONNECTION_UNBLOCKED_METHOD, ""},
    {MR_CONNECTION_UPDATE_SECRET_OK, ""},    {AMQP_CHANNEL_OPEN_OK_METHOD, "S"},
    {AMQP_CHANNEL_FLOW_METHOD, "b"},         {AMQP_CHANNEL_FLOW_OK_METHOD, "b"},
    {AMQP_CHANNEL_CLOSE_METHOD, "wsww"},     {AMQP_CHANNEL_CLOSE_OK_METHOD, ""},
    {AMQP_EXCHANGE_DECLARE_OK_METHOD, ""},   {AMQP_EXCHANGE_DELETE_OK_METHOD, ""},
    {AMQP_EXCHANGE_BIND_OK_METHOD, ""},      {AMQP_EXCHANGE_UNBIND_OK_METHOD, ""},
    {AMQP_QUEUE_DECLARE_OK_METHOD, "sll"},   {AMQP_QUEUE_BIND_OK_METHOD, ""},
    {AMQP_QUEUE_UNBIND_OK_METHOD, ""},       {AMQP_QUEUE_PURGE_OK_METHOD, "l"},
    {AMQP_QUEUE_DELETE_OK_METHOD, "l"},      {AMQP_BASIC_QOS_OK_METHOD, ""},
    {AMQP_BASIC_CONSUME_OK_METHOD, "s"},     {AMQP_BASIC_CANCEL_METHOD, "sb"},
    {AMQP_BASIC_CANCEL_OK_METHOD, "s"},      {AMQP_BASIC_RETURN_METHOD, "wsss"},
    {AMQP_BASIC_DELIVER_METHOD, "sqbss"},    {AMQP_BASIC_GET_OK_METHOD, "qbssl"},
    {AMQP_BASIC_GET_EMPTY_METHOD, "s"},      {AMQP_BASIC_ACK_METHOD, "qb"},
    {AMQP_BASIC_NACK_METHOD, "qb"},          {AMQP_BASIC_RECOVER_OK_METHOD, ""},
    {AMQP_TX_SELECT_OK_METHOD, ""},          {AMQP_TX_COMMIT_OK_METHOD, ""},
    {AMQP_TX_ROLLBACK_OK_METHOD, ""},        {AMQP_CONFIRM_SELECT_OK_METHOD, ""},
};

static const method_shape *find_shape(amqp_method_number_t id) {
  for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
    if (SHAPES[i].id == id) return &SHAPES[i];
  return NULL;
}

/* NULL, or what is wrong with the one argument of kind `kind`. */
static const char *check_arg(mr_reader *r, char kind) {
  const uint8_t *start = r->p;
  switch (kind) {
    case 'b': mr_read8(r); break;
    case 'w': mr_read16(r); break;
    case 'l': mr_read32(r); break;
    case 'q': mr_read64(r); break;
    case 's': mr_read_shortstr(r); break;
    case 'S': mr_read_longstr(r); break;
    default:
      mr_read_longstr(r);
      if (r->ok) return mr_table_check(mr_bytes(start, (size_t)(r->p - start)));
  }
  return r->ok ? NULL : "a method ends in the middle of an argument";
}

const char *mr_method_check(amqp_method_number_t method, amqp_bytes_t args) {
  const method_shape *shape = find_shape(method);
  if (!shape) return "a method that no broker sends";
  mr_reader r = mr_reader_of(args, true);
  for (const char *kind = shape->args; *kind; kind++) {
    const char *wrong = check_arg(&r, *kind);
    if (wrong) return wrong;
  }
  return r.p == r.end ? NULL : "a method with bytes behind its arguments";
}

/* In AMQP the answer of a method is the method with the next number, with three exceptions. */
amqp_method_number_t mr_method_reply(amqp_method_number_t method) {
  switch (method) {
    case AMQP_BASIC_RECOVER_ASYNC_METHOD: return 0;
    case AMQP_EXCHANGE_UNBIND_METHOD: return AMQP_EXCHANGE_UNBIND_OK_METHOD;
    default: return method + 1;
  }
}
