/* The methods that a broker sends: their shape, and which answers which. */
#ifndef MR_METHOD_H
#define MR_METHOD_H

#include "core/moonrabbit.h"

/* Whether the arguments of a method that a broker sends are well-formed, to the last byte: what
 * rabbitmq-c's decoder may then see. NULL, or what is wrong (static). */
const char *mr_method_check(amqp_method_number_t method, amqp_bytes_t args);

/* What the broker answers to a method; 0: nothing. */
amqp_method_number_t mr_method_reply(amqp_method_number_t method);

#endif
