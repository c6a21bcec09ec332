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
    local count, err = ch:queue_purge(args.queue)
    if not count then return nil, err end
    output.result({ queue = args.queue, messages = count }, ("%d messages purged from %s"):format(count, args.queue))
    return exit.ok
  end)
end

return purge
