--- moonrabbit delete queue|exchange

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local delete = { summary = "Delete a queue or an exchange." }

function delete.build(command, common)
  command:require_command(true)
  local queue = command:command "queue" :summary "Delete a queue and its messages."
  queue:argument "name" :convert(values.short)
  queue:flag "--if-unused" :description "Only when it has no consumers."
  queue:flag "--if-empty" :description "Only when it has no messages."
  common(queue)
  local exchange = command:command "exchange" :summary "Delete an exchange."
  exchange:argument "name" :convert(values.short)
  exchange:flag "--if-unused" :description "Only when nothing is bound to it."
  common(exchange)
end

function delete.run(args)
  return connect.with_channel(args, {}, function(ch)
    if args.queue then
      local count, err = ch:queue_delete(args.name, { if_unused = args.if_unused, if_empty = args.if_empty })
      if not count then return nil, err end
      output.result({ queue = args.name, messages = count },
        ("queue %s deleted, %d messages with it"):format(args.name, count))
      return exit.ok
    end
    local ok, err = ch:exchange_delete(args.name, { if_unused = args.if_unused })
    if not ok then return nil, err end
    output.result({ exchange = args.name }, ("exchange %s deleted"):format(args.name))
    return exit.ok
  end)
end

return delete
