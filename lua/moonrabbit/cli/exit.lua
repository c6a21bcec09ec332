--- What the command line's exit codes mean.

return {
  ok = 0,
  failed = 1,       -- the broker said no, nothing was there, or less was done than asked
  usage = 2,        -- the command itself is wrong
  unreachable = 3,  -- no connection: DNS, TCP, TLS, silence, not AMQP
  denied = 4,       -- wrong password, unknown vhost, no permission
  interrupted = 130,
  terminated = 143,
}
