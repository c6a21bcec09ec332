--- moonrabbit consume

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local messages = require "moonrabbit.cli.messages"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local consume = {
  summary = "Consume a queue: each message becomes a line of output.",
  epilog = "A message is acknowledged only after it has been written. --ack-mode requeue looks at messages and puts "
    .. "them all back at the end. Ctrl-C stops cleanly; what was not written stays in the queue.",
}

function consume.build(command, common)
  command:argument "queue" :convert(values.short)
  command:option "-n --count" :argname "<n>" :convert(values.count) :description "Stop after n messages."
  command:option "--ack-mode" :argname "<mode>" :choices { "ack", "none", "requeue", "reject" } :default "ack"
    :description("ack; none: the broker forgets each message as it sends it; requeue: put them back at the end; "
      .. "reject: dead-letter or drop them.")
  command:option "--prefetch" :argname "<n>" :convert(values.integer(1, 65535)) :default "100"
    :description "How many messages the broker sends ahead."
  command:flag "--exclusive" :description "Be the only consumer."
  command:flag "--raw" :description "Write the bodies only, with nothing between them."
  command:option "--argument" :argname "<name=value>" :count "*" :convert(values.argument)
    :description "Consumer argument such as x-priority=5 or x-stream-offset=first; may be repeated."
  common(command)
end

function consume.check(args)
  if args.raw and args.json then return "--raw and --json: give one of them" end
  if args.ack_mode == "requeue" then
    args.count = args.count or args.prefetch
    if args.count > 65535 then return "--ack-mode requeue holds every message: --count 65535 at most" end
    args.prefetch = args.count
  end
end

local at_stake = { ack = "the last acks", reject = "the last rejects" }

-- Settles what was written. Written is what the system has taken, not what waits in a buffer.
local function settle(state, args)
  local held = state.held
  local ok, err = output.flush()
  if not ok then return nil, err end
  if args.ack_mode == "requeue" then return true end
  for i = 1, #held do
    local msg = held[i]
    held[i] = nil
    if args.ack_mode == "ack" then ok, err = msg:ack()
    elseif args.ack_mode == "reject" then ok, err = msg:reject { requeue = false } end
    if not ok then
      state.unsettled = err
      return nil, err
    end
  end
  return true
end

-- Receives and writes until the count, the timeout or the end; returns how many, and why it ended.
local function pump(consumer, args, state)
  local held, seen = state.held, 0
  -- Messages that are here already are written together and settled together.
  local batch = math.max(1, math.min(64, math.floor(args.prefetch / 4)))
  while not state.stopped and seen ~= args.count do
    local msg, err = consumer:receive(0)
    if not msg and err.kind == "timeout" then
      local ok, broken = settle(state, args)
      if not ok then return seen, broken end
      msg, err = consumer:receive(args.timeout)
    end
    if not msg then return seen, err end
    if not args.quiet then
      local ok, broken = messages.write(msg, args)
      if not ok then return seen, broken end
    end
    seen = seen + 1
    if args.ack_mode ~= "none" then held[#held + 1] = msg end
    if #held >= batch and args.ack_mode ~= "requeue" then
      local ok, broken = settle(state, args)
      if not ok then return seen, broken end
    end
  end
  local ok, broken = settle(state, args)
  if not ok then return seen, broken end
  return seen
end

local function finish(args, state, seen, err)
  if state.unsettled then
    output.complain(("%s could not be sent, the broker delivers the messages again: %s")
      :format(at_stake[args.ack_mode], tostring(state.unsettled)))
    return state.stopped or exit.failed
  end
  if state.stopped then return state.stopped end
  if type(err) == "string" then
    output.complain("stdout cannot be written: " .. err)
    return exit.failed
  end
  if err and err.kind == "timeout" then
    if args.count and args.ack_mode ~= "requeue" and seen < args.count then
      output.note(("%d of %d messages within the timeout"):format(seen, args.count))
      return exit.failed
    end
    return exit.ok
  end
  if err then return nil, err end
  return exit.ok
end

function consume.run(args)
  -- --timeout is how long to wait for a message here, and may be short.
  return connect.with_channel(args, { prefetch = args.prefetch }, function(ch)
    local consumer, err = ch:consume(args.queue, {
      no_ack = args.ack_mode == "none", exclusive = args.exclusive or false, arguments = values.table(args.argument),
    })
    if not consumer then return nil, err end
    local state = { held = {} }
    local unwatch = connect.on_stop(function(why)
      state.stopped = why
      consumer:cancel()
    end)
    local seen, problem = pump(consumer, args, state)
    -- What was held back or never written goes to the queue again.
    consumer:cancel()
    if args.ack_mode ~= "none" then
      for i = #state.held, 1, -1 do state.held[i]:nack { requeue = true } end
    end
    unwatch()
    return finish(args, state, seen, problem)
  end, at_stake[args.ack_mode])
end

return consume
