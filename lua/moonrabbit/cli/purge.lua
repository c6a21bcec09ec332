--- moonrabbit purge

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local purge = { summary = "Remove every message of a queue that waits to be delivered." }

function purge.build(command, common)
  command:argument "queue" :convert(values.short)
  common(command)
end

function purge.run(args)
  return connect.with_channel(args, {}, function(ch)
    local reply, err = ch:queue_purge(args.queue)
    if not reply then return nil, err end
    local count = type(reply) == "table" and reply.message_count or reply
    output.result({ queue = args.queue, messages = count }, ("%d messages purged from %s"):format(count, args.queue))
    return exit.ok
  end)
end

return purge
