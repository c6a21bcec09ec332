--- The management API for commands: where it is, as whom, and what an error of it means for the exit code.

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local api = {}

--- Adds the option to a command.
function api.add_option(command)
  command:option "--management" :argname "<url>"
    :description("The management API: http[s]://host:port. By default MOONRABBIT_MANAGEMENT_URL, else the URL's host "
      .. "at port 15672, or 15671 with TLS; with the URL's user and password unless it has its own.")
end

local function usual_address(parsed)
  if parsed.path or parsed.srv then return nil end
  local host = parsed.host:find(":", 1, true) and "[" .. parsed.host .. "]" or parsed.host
  return parsed.tls and "https://" .. host .. ":15671" or "http://" .. host .. ":15672"
end

-- Options of management.new; nil and what is wrong.
local function settings(args)
  local management = require "moonrabbit.management"
  local options, parsed = credentials.resolve(args)
  if not options then return nil, parsed end
  local given = args.management or os.getenv "MOONRABBIT_MANAGEMENT_URL"
  if given == "" then given = nil end
  local address = given or usual_address(parsed)
  if not address then return nil, "the URL does not tell where the management API is: say it with --management" end
  local parts, problem = management.parse(address)
  if not parts then return nil, problem end
  output.secret(parts.password)
  local own = parts.user ~= nil
  return {
    uri = address, timeout = args.timeout or 10,
    user = not own and parsed.user or nil, password = not own and parsed.password or nil,
    tls = parts.secure and parsed.tls or nil,
  }
end

--- A client, or nil and what is wrong.
function api.client(args)
  local opts, problem = settings(args)
  if not opts then return nil, problem end
  return require("moonrabbit.management").new(opts)
end

--- A client, or nil and an exit code, with the complaint made.
function api.open(args)
  local client, problem = api.client(args)
  if client then return client end
  output.complain(problem)
  return nil, exit.usage
end

--- Complains about an error and returns its exit code.
function api.fail(err) return connect.fail(err, true) end

return api
