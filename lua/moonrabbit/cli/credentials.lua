--- Which broker, as whom: from options, files and the environment, never echoed.

local output = require "moonrabbit.cli.output"
local uri = require "moonrabbit.uri"

local credentials = {}

local default_url = "amqp://guest:guest@localhost/"

-- The first line of a file; a file that others can read is the user's own affair.
local function first_line(path, what)
  local file, err = io.open(path, "r")
  if not file then return nil, ("the %s cannot be opened: %s"):format(what, err) end
  local line = file:read "*l"
  file:close()
  line = line and line:gsub("\r$", "")
  if not line or line == "" then return nil, ("the %s %s is empty"):format(what, path) end
  return line
end

local function find_url(args, own)
  if args.url then return args.url, "--url" end
  if args.url_file then
    local line, err = first_line(args.url_file, "URL file")
    return line, line and "--url-file" or err
  end
  for _, name in ipairs { "MOONRABBIT_URL", "AMQP_URL" } do
    local value = os.getenv(name)
    if value and value ~= "" then return value, name end
  end
  if own then return own, "the script" end
  return default_url, "the default"
end

-- What was given of TLS, over what the URL says.
local function tls_options(args, parsed)
  local given = {
    ca = args.ca, cert = args.cert, key = args.key, server_name = args.server_name, min_version = args.tls_min_version,
  }
  if args.insecure then given.verify = false end
  if next(given) == nil then return nil end
  if not parsed.tls then return nil, "TLS options need a URL that starts with amqps://" end
  return given
end

local inside = { ["the script"] = true, ["the default"] = true }

--- Whether a URL was typed or is in the environment.
function credentials.is_outside(source) return not inside[source] end

--- Options for moonrabbit.connect, the parsed URI, and where the URL is from; or nil and what is wrong. `own`: a
--- script's URL, which counts before the default.
function credentials.resolve(args, own)
  local text, source = find_url(args, own)
  if not text then return nil, source end
  local parsed, problem = uri.parse(text)
  if not parsed then return nil, ("%s (from %s)"):format(problem, source) end

  local options = { uri = text, user = args.user, vhost = args.vhost }
  if args.password_file then
    local password, err = first_line(args.password_file, "password file")
    if not password then return nil, err end
    options.password = password
  elseif os.getenv "MOONRABBIT_PASSWORD" then
    options.password = os.getenv "MOONRABBIT_PASSWORD"
  end
  parsed.user = options.user or parsed.user
  parsed.password = options.password or parsed.password
  parsed.vhost = options.vhost or parsed.vhost
  if parsed.password ~= parsed.user then output.secret(parsed.password) end

  local tls
  tls, problem = tls_options(args, parsed)
  if problem then return nil, problem end
  options.tls = tls
  for name, value in pairs(tls or {}) do parsed.tls[name] = value end
  return options, parsed, source
end

--- Adds the options every command has to an argparse parser or command.
-- They may stand before the command as well; argparse forgets those when the command declares its own,
-- so `given` keeps what was typed.
function credentials.add_options(parser, given)
  local function keep(option)
    return option:action(function(args, name, value)
      if value == nil then value = true end
      args[name], given[name] = value, value
    end)
  end
  local function option(name) return keep(parser:option(name)) end
  local function flag(name) return keep(parser:flag(name)) end
  parser:group("Connection",
    option "-u --url" :argname "<url>"
      :description("amqp[s]://user:password@host:port/vhost. Others on the machine can see what is typed here: "
        .. "with a password in it prefer a file or the environment."),
    option "--url-file" :argname "<file>" :description "A file whose first line is the URL.",
    option "--user" :argname "<name>" :description "User, instead of the URL's.",
    option "--password-file" :argname "<file>"
      :description "A file whose first line is the password, instead of the URL's.",
    option "--vhost" :argname "<name>" :description "Virtual host, instead of the URL's.",
    option "--timeout" :argname "<seconds>" :convert(credentials.seconds)
      :description("How long connecting and each answer may take (10); "
        .. "consume: also how long to wait for a message (for ever)."))
  parser:group("TLS (with amqps://)",
    option "--ca" :argname "<file>" :description "Certificate authorities to trust, instead of the system's.",
    option "--cert" :argname "<file>" :description "Client certificate (PEM).",
    option "--key" :argname "<file>" :description "Its key (PEM).",
    option "--server-name" :argname "<name>" :description "The name to expect in the certificate.",
    option "--tls-min-version" :argname "<version>" :choices { "1.2", "1.3" } :description "1.2 or 1.3.",
    flag "--insecure" :description "Verify nothing.")
  parser:group("Output",
    flag "--json" :description "Results as JSON, one object a line.",
    flag "-q --quiet" :description "No results, remarks and progress; errors only.")
end

--- argparse converter: a number of seconds above 0.
function credentials.seconds(text)
  local n = tonumber(text)
  if not n or n ~= n or n <= 0 or n > 1e9 then return nil, ("'%s' is no number of seconds above 0"):format(text) end
  return n
end

credentials.environment = [[
Environment:
   MOONRABBIT_URL, AMQP_URL   the URL, unless --url or --url-file gives it
                              (else amqp://guest:guest@localhost/)
   MOONRABBIT_PASSWORD        the password, instead of the URL's]]

return credentials
