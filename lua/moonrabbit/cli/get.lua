--- moonrabbit get

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local messages = require "moonrabbit.cli.messages"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local get = {
  summary = "Look at the first messages of a queue (they stay, unless you say otherwise).",
  epilog = "Exits with 1 when the queue is empty. Messages that stay are marked as redelivered.",
}

function get.build(command, common)
  command:argument "queue" :convert(values.short)
  command:option "-n --count" :argname "<n>" :convert(values.integer(1, 65535)) :default "1"
    :description "How many at most."
  command:option "--ack-mode" :argname "<mode>" :choices { "requeue", "ack", "none", "reject" } :default "requeue"
    :description "requeue: put them back; ack or none: remove them; reject: dead-letter or drop them."
  command:flag "--raw" :description "Write the bodies only, with nothing between them."
  common(command)
end

function get.check(args)
  if args.raw and args.json then return "--raw and --json: give one of them" end
end

local at_stake = { ack = "the acks", reject = "the rejects" }

-- The first error counts: those that follow are the same. One of requeue does not: the broker puts them back itself.
local function settle(held, mode)
  local problem
  for i = #held, 1, -1 do
    local msg = held[i]
    local ok, err = true, nil
    if mode == "ack" then ok, err = msg:ack()
    elseif mode == "reject" then ok, err = msg:reject { requeue = false }
    elseif mode == "requeue" then msg:nack { requeue = true } end
    if not ok and not problem then problem = err end
  end
  return problem
end

function get.run(args)
  return connect.with_channel(args, {}, function(ch)
    local held, seen = {}, 0
    while seen < args.count do
      local msg, err = ch:get(args.queue, { no_ack = args.ack_mode == "none" })
      if not msg then
        if err then return nil, err end
        break
      end
      seen = seen + 1
      if args.ack_mode ~= "none" then held[#held + 1] = msg end
      if not args.quiet then
        local ok, problem = messages.write(msg, args)
        if not ok then
          output.complain("stdout cannot be written: " .. tostring(problem))
          settle(held, "requeue")
          return exit.failed
        end
      end
    end
    local flushed, problem = output.flush()
    if not flushed then output.complain("stdout cannot be written: " .. tostring(problem)) end
    local unsettled = settle(held, flushed and args.ack_mode or "requeue")
    if unsettled then
      output.complain(("%s could not be sent, the broker delivers the messages again: %s")
        :format(at_stake[args.ack_mode], tostring(unsettled)))
      return exit.failed
    end
    if seen == 0 then output.note(("queue %s is empty"):format(args.queue)) end
    return seen > 0 and flushed and exit.ok or exit.failed
  end, at_stake[args.ack_mode])
end

return get
