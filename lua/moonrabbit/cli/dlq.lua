--- moonrabbit dlq list|show|replay|purge

local connect = require "moonrabbit.cli.connect"
local filters = require "moonrabbit.cli.dlq.filters"
local values = require "moonrabbit.cli.values"

local dlq = {
  summary = "List, show, replay or purge dead letters.",
  epilog = "A replay acks a dead letter only once the broker has confirmed its copy: it may be stopped at any time "
    .. "and started again. What is only looked at, or does not match, stays; such messages are marked as redelivered.",
}

local function rate(text)
  local n = tonumber(text)
  if not n or not (n > 0 and n <= 1e6) then return nil, ("'%s' is no number of messages a second"):format(text) end
  return n
end

local function add(command, name, summary)
  local sub = command:command(name) :summary(summary) :description(summary)
  sub:argument "queue" :convert(values.short)
  return sub
end

local function finish(sub, common)
  filters.add_options(sub)
  common(sub)
end

local function limit(sub, default)
  sub:option "-n --limit" :argname "<n>" :convert(values.count) :default(default) :description "How many at most."
end

function dlq.build(command, common)
  command:require_command(true)
  local list = add(command, "list", "A line for each dead letter: when, how often, where, why.")
  limit(list, "100")
  finish(list, common)

  local show = add(command, "show", "One dead letter with its headers, traceback and body.")
  show:argument "n" :args "?" :convert(values.integer(1, 999999999))
    :description "Which one of those that match; the first by default."
  finish(show, common)

  local replay = add(command, "replay", "Send dead letters back to the queue where they died.")
  replay:flag "--republish" :description "To the exchange and key where they were published, and all queues there."
  replay:option "--to" :argname "<queue>" :convert(values.short) :description "To this queue."
  replay:option "--rate" :argname "<n>" :convert(rate) :description "How many a second at most."
  limit(replay)
  replay:flag "--dry-run" :description "Only say what would be done."
  finish(replay, common)

  local purge = add(command, "purge", "Remove dead letters for good.")
  limit(purge)
  purge:flag "--dry-run" :description "Only say what would be done."
  finish(purge, common)
end

function dlq.check(args)
  if args.to and args.republish then return "--to and --republish: give one of them" end
end

local at_stake = "the last acks"

function dlq.run(args)
  return connect.with_channel(args, {}, function(ch, conn)
    if args.list then return require "moonrabbit.cli.dlq.show".list(ch, args) end
    if args.show then return require "moonrabbit.cli.dlq.show".one(ch, args) end
    if args.replay then return require "moonrabbit.cli.dlq.replay".replay(ch, args, conn) end
    return require "moonrabbit.cli.dlq.replay".purge(ch, args)
  end, not args.dry_run and (args.replay or args.purge) and at_stake or nil)
end

return dlq
