--- moonrabbit bind queue|exchange

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local values = require "moonrabbit.cli.values"

local bind = { summary = "Bind a queue or an exchange to an exchange (--remove: unbind)." }

local function add(command, what, description, common)
  local sub = command:command(what) :summary(description)
  sub:argument "destination" :convert(values.short) :description("The " .. what .. " that is to receive.")
  sub:argument "source" :convert(values.short) :description "The exchange that messages come from."
  sub:option "-k --routing-key" :argname "<key>" :convert(values.short) :default "" :show_default(false)
    :description "Routing key or pattern (empty by default)."
  sub:option "--argument" :argname "<name=value>" :count "*" :convert(values.argument)
    :description "For headers exchanges and the like: name=value or name:=JSON; may be repeated."
  sub:flag "--remove" :description "Remove the binding instead."
  common(sub)
end

function bind.build(command, common)
  command:require_command(true)
  add(command, "queue", "Bind a queue to an exchange.", common)
  add(command, "exchange", "Bind an exchange to an exchange.", common)
end

function bind.run(args)
  local what = args.queue and "queue" or "exchange"
  return connect.with_channel(args, {}, function(ch)
    local method = what .. (args.remove and "_unbind" or "_bind")
    local ok, err = ch[method](ch, args.destination, args.source, args.routing_key,
      { arguments = values.table(args.argument) })
    if not ok then return nil, err end
    output.result({ [what] = args.destination, source = args.source, routing_key = args.routing_key,
      bound = not args.remove },
      ("%s %s %s %s with '%s'"):format(what, args.destination, args.remove and "unbound from" or "bound to",
        args.source, args.routing_key))
    return exit.ok
  end)
end

return bind
