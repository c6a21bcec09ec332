--- moonrabbit declare queue|exchange

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local declare = { summary = "Declare a queue or an exchange (durable unless said otherwise)." }

local arguments_help = "name=value (integers, true and false are typed) or name:=JSON; may be repeated."

function declare.build(command, common)
  command:require_command(true)
  local queue = command:command "queue" :summary "Declare a queue."
  queue:argument "name" :args "?" :convert(values.short) :description "Its name; without one the broker makes one up."
  queue:option "--type" :argname "<type>" :choices { "classic", "quorum", "stream" }
    :description "classic, quorum or stream."
  queue:flag "--transient" :description "Not durable: gone when the broker restarts."
  queue:flag "--auto-delete" :description "Deleted when its last consumer is gone."
  queue:flag "--passive" :description "Only check that it exists."
  queue:option "--argument" :argname "<name=value>" :count "*" :convert(values.argument) :description(arguments_help)
  common(queue)

  local exchange = command:command "exchange" :summary "Declare an exchange."
  exchange:argument "name" :convert(values.short)
  exchange:option "--type" :argname "<type>" :convert(values.short)
    :description "direct (default), fanout, topic, headers, or a plugin's."
  exchange:flag "--transient" :description "Not durable: gone when the broker restarts."
  exchange:flag "--auto-delete" :description "Deleted when its last binding is gone."
  exchange:flag "--internal" :description "Takes messages from other exchanges only."
  exchange:flag "--passive" :description "Only check that it exists."
  exchange:option "--alternate" :argname "<exchange>" :convert(values.short)
    :description "Where messages go that no binding takes."
  exchange:option "--argument" :argname "<name=value>" :count "*" :convert(values.argument) :description(arguments_help)
  common(exchange)
end

local function declare_queue(args, ch)
  local arguments = values.table(args.argument) or {}
  if args.type then arguments["x-queue-type"] = args.type end
  local reply, err = ch:queue_declare(args.name, {
    durable = not args.transient, auto_delete = args.auto_delete or false, passive = args.passive or false,
    arguments = next(arguments) ~= nil and arguments or nil,
  })
  if not reply then return nil, err end
  output.result({ queue = reply.queue, messages = reply.message_count, consumers = reply.consumer_count },
    ("queue %s: %d messages, %d consumers"):format(reply.queue, reply.message_count, reply.consumer_count))
  return exit.ok
end

local function declare_exchange(args, ch)
  local arguments = values.table(args.argument) or {}
  if args.alternate then arguments["alternate-exchange"] = args.alternate end
  local kind = args.type or "direct"
  local ok, err = ch:exchange_declare(args.name, {
    type = kind, durable = not args.transient, auto_delete = args.auto_delete or false,
    internal = args.internal or false, passive = args.passive or false,
    arguments = next(arguments) ~= nil and arguments or nil,
  })
  if not ok then return nil, err end
  output.result({ exchange = args.name, type = kind }, ("exchange %s"):format(args.name))
  return exit.ok
end

function declare.run(args)
  return connect.with_channel(args, {}, function(ch)
    if args.queue then return declare_queue(args, ch) end
    return declare_exchange(args, ch)
  end)
end

return declare
